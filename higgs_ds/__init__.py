"""LoRA fine-tuning of Higgs Audio v2 and Higgs TTS 3 on DeepSpeed."""
