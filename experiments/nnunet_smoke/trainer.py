"""nnU-Net's trainer for the smoke table; it finds it by path (nnUNet_extTrainer)."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import (  # pyright: ignore[reportMissingImports]
    nnUNetTrainer,
)


class nnUNetTrainer_smoke_1epoch(nnUNetTrainer):
    """nnU-Net's own training in 24 steps, of a network a quarter as wide."""

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008
    ):
        # The plans are saved beside the checkpoint, so prediction builds the same.
        kwargs = plans["configurations"][configuration]["architecture"]["arch_kwargs"]
        kwargs["features_per_stage"] = [n // 4 for n in kwargs["features_per_stage"]]
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 1
        self.num_iterations_per_epoch = 24
        self.num_val_iterations_per_epoch = 1

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        """As in nnU-Net's nnUNetTrainerNoMirroring: four times fewer test passes."""
        found = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return *found[:3], None
