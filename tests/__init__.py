"""Tests of nbfeat."""
