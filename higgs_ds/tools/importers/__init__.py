"""Import of other tools' corpora into manifests."""
