"""Known pixel statistics: mean and std per channel on the [0,1] scale."""

# The training images of the reference's 13M-image set of fetal ultrasound.
FUS = ((0.1842924807,), (0.2187705424,))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
NORMALIZATION = {"fus": FUS, "imagenet": IMAGENET}
