"""What `sfa bench` does: time, memory and answers of a reduced model beside those of the untouched one."""
