#!/bin/sh
# sh course/new.sh NAME: a run folder runs/NAME with the finished SFT and reward models of runs/toy in it.
set -e
[ -n "$1" ] || { echo "give a name: sh course/new.sh NAME"; exit 2; }
[ -d runs/toy/reward ] || { echo "there is no runs/toy/reward: run the README's first command"; exit 2; }
[ -e "runs/$1/ppo" ] && { echo "runs/$1 has a PPO run already: choose another name"; exit 2; }
mkdir -p "runs/$1"
cp -r runs/toy/sft runs/toy/reward "runs/$1"
