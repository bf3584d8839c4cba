"""Benchmarks of MiCS and its peers on an emulated cluster: real ranks, a network as slow as asked for."""
