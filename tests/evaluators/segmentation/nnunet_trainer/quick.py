"""A trainer for nnU-Net that ends in minutes on a CPU; nnU-Net finds it by path.

Only test_nnunet.py's opt-in test names this folder, in nnUNet_extTrainer.
"""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class nnUNetTrainer_quick_4epochs(nnUNetTrainer):
    """nnU-Net's own training, shorter: 4 epochs of 75 steps instead of 1000 of 250."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 4
        self.num_iterations_per_epoch = 75
        self.num_val_iterations_per_epoch = 2
