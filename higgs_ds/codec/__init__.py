"""Audio to codes and back: Boson's codec, or the sample codec where Boson's weights cannot be had."""
