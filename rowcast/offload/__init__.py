"""Weights and KV in host memory: banks of rows, streams to the GPU, and caches there.

May import `kernels` and the contracts in `runtime/` (`protocols`, `spec`, `step`), which its views implement; never the rest of
`runtime`, into which it is injected. Under construction.
"""
