"""What `rowcast bench kernels` runs: one module a family of kernels, each with `cases(device_name) -> Iterator[Case]`."""
