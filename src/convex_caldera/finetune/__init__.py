"""Winning back quality after compression: the continuous parts are trained, codes never change.

parts, tunable, factors   what of a layer is trained, and the layer while it is
blockwise, distill, tasks what is minimised: activations, the original's predictions, a task
training, schedule, state the one loop, resumable, never worse than it began
"""
