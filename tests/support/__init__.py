"""What several tests share: small models, references, comparisons, programs that tests start."""
