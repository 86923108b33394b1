"""Hostile trials: kills, signals, disks, damage, hosts, frames, limits and odd interpreters.

A trial shows the right features, equal to the bit to those of an undisturbed run, or one clear error of nbfeat, and
leaves nothing behind. ``pytest -m robustness`` runs the suite, a tenth of the whole, and counts the trials;
NBFEAT_TEST_EXAMPLES=10 runs the whole sweep.
"""
