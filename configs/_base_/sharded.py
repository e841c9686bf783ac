"""Parameters, gradients and optimizer state sharded among all processes: add this file to the bases of a recipe."""

runner_type = 'SwinV2FlexibleRunner'
strategy = dict(type='SwinV2FSDPStrategy')
