"""The published figures that runs are compared with."""

# Test error in percent at the best validation error: Huang et al., Figure 3, Table 1 and section 4; of 1202 layers at
# constant depth, He et al., Table 6.
TEST_ERROR = {
    ("cifar_resnet110", "cifar10"): 6.41,
    ("cifar_resnet110_sd", "cifar10"): 5.25,
    ("cifar_resnet1202", "cifar10"): 7.93,
    ("cifar_resnet1202_sd", "cifar10"): 4.91,
    ("cifar_resnet110", "cifar100"): 27.22,
    ("cifar_resnet110_sd", "cifar100"): 24.58,
}

# Seconds an epoch of depth 110, constant and stochastic.
SECONDS = {
    "the authors, TITAN X": (75.0, 60.0),
    "a later reproduction": (69.4, 52.1),  # 57m48s and 43m26s for 50 epochs
}
