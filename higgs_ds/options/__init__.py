"""Every option of a run: sections, defaults ← YAML ← flags, and what other trainers call them. No torch."""
