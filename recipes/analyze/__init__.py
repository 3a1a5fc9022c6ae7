"""What `sfa analyze` does: measurements that end in a table and pictures."""
