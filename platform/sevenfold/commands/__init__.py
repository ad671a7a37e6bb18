"""The commands of the command line. Each takes its arguments and calls what does the work.

They import the library in their bodies, so that `sevenfold --help` need not load torch and Ray.
"""
