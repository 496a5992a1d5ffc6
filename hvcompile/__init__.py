"""hvcompile: a torch.compile backend, ``hvfast``, for video diffusion transformers."""
