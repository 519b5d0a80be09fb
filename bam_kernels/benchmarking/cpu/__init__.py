"""On CPUs: the C++ backend beside its peers."""
