"""Training: a backend-neutral loop and worker process, and the backends. torch is imported in `torch_backend` alone."""
