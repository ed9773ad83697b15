"""Options of a run: sections, defaults ← YAML ← flags, other trainers' names. Needs no torch."""
