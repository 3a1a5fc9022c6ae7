"""The benchmarks of `sfa bench`: time, memory and answers of a reduced model against the untouched one."""
