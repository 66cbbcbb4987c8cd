"""BDWP: N:M weights in the forward and in the backward pass, and what an accelerator would save.

Paper: "Efficient N:M sparse DNN training using algorithm, architecture, and dataflow co-design"
(IEEE TCAD 2023). Expected: at 2:8 training needs about half the multiply-accumulates and loses
about half a point of accuracy; on a systolic array that skips zeros that is 1.75 times as fast.
The array is a model here, and masked products on a CPU are dense ones: no seconds are claimed.
"""

MINUTES = {"laptop": "2", "test": "0.3", "paper": "checked abstractly"}
