"""On GPUs: the Triton backend beside its peers, and the bandwidth of a copy."""
