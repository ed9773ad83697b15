"""Higgs TTS 3 (Higgs Audio v3 TTS): a Qwen3 decoder with one table of codes as both embedding and head."""
