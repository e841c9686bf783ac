"""Training and evaluation with mmengine: optimizers, mixed precision, the runner, and the start of the tools."""
