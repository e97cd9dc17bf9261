"""Families of public decoders: conversion of settings to ModelConfig, and of tensors to ours."""
