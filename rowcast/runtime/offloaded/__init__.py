"""Models of which a part lies in host memory: weight views that execute a plan's tiers, by what `offload` copies and caches."""
