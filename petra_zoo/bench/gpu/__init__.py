"""One GPU: what a training step and a tick cost there, beside what timm and torch offer (`benchmarks/gpu.py`)."""
