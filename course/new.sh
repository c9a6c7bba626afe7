#!/bin/sh
# sh course/new.sh NAME: a run folder runs/NAME with the finished SFT and reward models of runs/toy in it.
set -e
[ -e "runs/$1/ppo" ] && { echo "runs/$1 has a PPO run already: choose another name"; exit 2; }
mkdir -p "runs/$1"
cp -r runs/toy/sft runs/toy/reward "runs/$1"
