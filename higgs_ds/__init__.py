"""LoRA fine-tuning of Higgs Audio v2 on DeepSpeed."""
