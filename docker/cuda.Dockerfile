# sfa-adapters on NVIDIA GPUs: training and evaluation of whole hosts. The torch of the index brings CUDA's libraries; the
# machine needs a driver and the NVIDIA Container Toolkit.
#   docker build -f docker/cuda.Dockerfile -t sfa-adapters:cuda .
#   docker run --rm --gpus all --ipc=host -v "$PWD/runs:/runs" -v "$HOME/.cache/huggingface:/home/sfa/.cache/huggingface" \
#     sfa-adapters:cuda train internvl3_5_8b --output /runs/internvl
FROM python:3.11-slim-bookworm

# triton compiles a launcher for its kernels when they are first called.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install --yes --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 sfa
WORKDIR /home/sfa/clone
COPY pyproject.toml README.md LICENSE ./
COPY sfa_adapters sfa_adapters
COPY backbones backbones
COPY recipes recipes
RUN pip install --no-cache-dir -e ".[recipes,demo,timm,vision]"

USER 1000
WORKDIR /home/sfa
ENTRYPOINT ["sfa"]
CMD ["--help"]
