"""The published results that runs are compared with."""

# Test error in percent at the best validation error, for stochastic depth with linear decay to p_L = 0.5: Huang et al.,
# Figure 3, Table 1 and section 4; for 1202 layers at constant depth: He et al., Table 6.
TEST_ERROR = {
    (110, "constant", "cifar10"): 6.41,
    (110, "stochastic", "cifar10"): 5.25,
    (1202, "constant", "cifar10"): 7.93,
    (1202, "stochastic", "cifar10"): 4.91,
    (110, "constant", "cifar100"): 27.22,
    (110, "stochastic", "cifar100"): 24.58,
}

# Seconds per epoch with 110 layers, constant and stochastic.
SECONDS = {
    "the authors, TITAN X": (75.0, 60.0),
    "a later reproduction": (69.4, 52.1),  # 57m48s and 43m26s for 50 epochs
}
