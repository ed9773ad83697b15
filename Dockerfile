# The CUDA stack: docker build -t higgs_ds . && docker run --gpus all -v $PWD/data:/data higgs_ds deepspeed train_ds.py …
FROM nvidia/cuda:12.8.1-devel-ubuntu22.04
RUN apt-get update && apt-get install -y --no-install-recommends python3 python3-dev python3-venv python3-pip g++ git \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /higgs_ds
COPY requirements.txt .
RUN python3 -m pip install --no-cache-dir -r requirements.txt
COPY . .
