"""Self-distillation that makes a model's FFNs hold up at a part of their neurons (`rowcast adapt`)."""
