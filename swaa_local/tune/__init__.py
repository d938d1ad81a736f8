"""`swaa-local tune`: a short LoRA fine-tune under a schedule's own masks. PyTorch is imported when a command runs."""
