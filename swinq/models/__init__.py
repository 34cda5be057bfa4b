"""The float Swin Transformers (v1 and v2), their official names, the loader of checkpoints."""
