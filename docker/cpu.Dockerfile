# sfa-adapters on a CPU: the demo, nano hosts, inspection of models.
#   docker build -f docker/cpu.Dockerfile -t sfa-adapters:cpu .
#   docker run --rm -v "$PWD/out:/out" sfa-adapters:cpu demo --out /out
# With --build-arg TORCH_INDEX=URL torch comes from another index: the one for CPUs on PyTorch's page "Start locally" has
# wheels without CUDA, which save some gigabytes.
FROM python:3.11-slim-bookworm

RUN useradd --create-home --uid 1000 sfa
WORKDIR /home/sfa/clone
COPY pyproject.toml README.md LICENSE ./
COPY sfa_adapters sfa_adapters
COPY backbones backbones
COPY recipes recipes
# torch of the given index first: pip then leaves it alone. The range is that of pyproject.toml.
ARG TORCH_INDEX=
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "torch>=2.11,<2.16" torchvision \
 && pip install --no-cache-dir -e ".[demo,timm,vision]"

USER 1000
WORKDIR /home/sfa
ENTRYPOINT ["sfa"]
CMD ["--help"]
