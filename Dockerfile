# skipdit on one NVIDIA GPU: torch's packages bring CUDA, and the host needs only the driver and its container toolkit.
#   docker build -t skipdit .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/data" skipdit demo
# Without --gpus it runs on the CPU. What commands write lies in the folder that is mounted as /data, as do downloads.
FROM python:3.11-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONUNBUFFERED=1 HOME=/data HF_HOME=/data/.cache/huggingface \
    NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY . /tmp/skipdit
RUN pip install "/tmp/skipdit[lora,metrics,minilm]" && rm -r /tmp/skipdit
RUN useradd --no-create-home skipdit && mkdir --mode 777 /data
USER skipdit
WORKDIR /data
ENTRYPOINT ["skipdit"]
CMD ["doctor"]
