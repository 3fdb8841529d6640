#!/bin/bash
# One process per GPU with Open MPI: bash launch/mpirun.sh
PROCESSES=16                           # CHANGE: GPUs of all nodes
HOSTS=node1:8,node2:8                  # CHANGE: nodes and GPUs of each, the first one holds process 0
PORT=8476                              # CHANGE: free on the first node
CONFIG=moe_1b_64x                      # CHANGE: your config
WORKDIR=$HOME/runs/moe_1b_64x          # CHANGE: on a file system that all nodes share

# Process 0 is on the first host, wherever mpirun itself runs. Stop it with SIGUSR1: mpirun kills after SIGTERM.
export MOEJAX_COORDINATOR=${HOSTS%%:*}:$PORT MOEJAX_PROCESSES=$PROCESSES
exec mpirun -n "$PROCESSES" --host "$HOSTS" --bind-to none -x MOEJAX_COORDINATOR -x MOEJAX_PROCESSES -x PATH \
  bash -c 'MOEJAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK exec moejax train "$0" --workdir "$1"' "$CONFIG" "$WORKDIR"
