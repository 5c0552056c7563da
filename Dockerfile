# CUDA image:  docker build -t ultradino_jax .
#              docker run --gpus all --shm-size=16g -v /data:/data -v /runs:/runs \
#                  ultradino_jax main.py --config=configs/pretrain_vitb.py \
#                  --workdir=/runs/vitb --config.data.root=/data
# Loader processes hand batches over in shared memory, of which Docker gives 64 MB by
# default. /runs must be writable by user 1000, or add --user.
# JAX brings its own CUDA libraries as wheels; the host needs the driver and the NVIDIA
# container toolkit, nothing else. Without --gpus it runs on the CPU.
FROM python:3.11-slim-bookworm

ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=1
WORKDIR /opt/ultradino_jax

# Dependencies first: they change less often than the code.
COPY setup.py pyproject.toml ./
RUN mkdir ultradino_jax && touch ultradino_jax/__init__.py \
    && pip install -e '.[cuda,dicom,parquet]'

COPY LICENSE main.py eval.py ./
COPY configs configs
COPY experiments experiments
COPY ultradino_jax ultradino_jax

# Images and results belong to the user who mounts them.
RUN useradd --create-home --uid 1000 user && mkdir /runs && chown user /runs
USER 1000
ENTRYPOINT ["python"]
CMD ["main.py", "--config=configs/pretrain_smoke.py", "--workdir=/runs/smoke"]
