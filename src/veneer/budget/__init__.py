"""A budget of ranks that many adapters share and that is cut while they are trained (AdaLoRA)."""
