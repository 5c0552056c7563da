"""Package metadata. Tool settings live in pyproject.toml."""

from setuptools import find_packages, setup

# Upper bounds stop at the next release line that has not been run here: the test suite
# treats warnings as errors, so an untested major version would fail for its news alone.
REQUIRES = [
    "jax>=0.10.2,<0.11",
    "flax>=0.12.8,<0.13",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "ml-collections>=1.1.0,<2",
    "tensorflow-datasets>=4.9.10,<5",
    "array-record>=0.8.6,<0.9",
    "clu>=0.0.12,<0.1",
    "numpy>=2.2,<3",
    "scipy>=1.15,<2",
    "scikit-learn>=1.6,<2",
    "einops>=0.8.1,<0.9",
    "absl-py>=2.1",
    "opencv-python-headless>=4.10,<6",
    "pillow>=11,<14",
    "pydicom>=3.0.1,<4",
    "tensorboardX>=2.6.4,<3",
    "matplotlib>=3.9,<4",
    "rich>=13.9,<16",
    "safetensors>=0.8,<0.9",
    "tifffile>=2025.1",
    "ml-dtypes>=0.5",
]

EXTRAS = {
    "cuda": ["jax[cuda13]>=0.10.2,<0.11"],
    # JPEG 2000, RLE; lossless JPEG and JPEG-LS. All permissive licences.
    "dicom": [
        "pylibjpeg>=2.0",
        "pylibjpeg-openjpeg>=2.4",
        "pylibjpeg-rle>=2.1",
        "python-gdcm>=3.0.24",
    ],
    "nifti": ["nibabel>=5.3"],
    "parquet": ["pyarrow>=17"],
    "test": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.120",
        "ruff>=0.9",
        "pyright>=1.1.390",
        "scikit-image>=0.25",
        "nibabel>=5.3",
    ],
    "interop": [
        "torch>=2.6,<3",
        "transformers>=4.48,<6",
        "onnx>=1.17",
        "onnxruntime>=1.20",
    ],
}

setup(
    name="ultradino_jax",
    version="0.1.0",
    description="DINOv2 pretraining and evaluation for ultrasound in JAX/Flax",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ultradino_jax", "ultradino_jax.*"]),
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
