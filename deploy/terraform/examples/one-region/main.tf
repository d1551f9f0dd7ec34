# One server in one region. Another region: another workspace or folder, with variables of its own; see ../two-regions
# for several at once.

terraform {
  required_version = ">= 1.9"

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "5.100.0"
    }
  }
}

provider "aws" {
  region = var.region

  default_tags {
    tags = { Project = "openpi-flash" }
  }
}

variable "region" {
  description = "Region of the server: the nearest to the robots."
  type        = string
}

variable "subnet_id" {
  description = "Public subnet in a zone that offers the instance type."
  type        = string
}

variable "image_registry" {
  description = "Output of ../../shared."
  type        = string
}

variable "instance_profile" {
  description = "Output of ../../shared."
  type        = string
}

variable "client_cidr_blocks" {
  description = "IPv4 networks of the robots."
  type        = list(string)
}

variable "auth_tokens_parameter" {
  description = "Parameter with the accepted tokens; null: none is asked for."
  type        = string
  default     = null
}

variable "image_tag" {
  description = "Tag of the images."
  type        = string
  default     = "latest"
}

module "server" {
  source = "../../modules/regional_inference_instance"

  subnet_id             = var.subnet_id
  image_registry        = var.image_registry
  image_tag             = var.image_tag
  instance_profile      = var.instance_profile
  client_cidr_blocks    = var.client_cidr_blocks
  auth_tokens_parameter = var.auth_tokens_parameter

  # pi0.5 for ALOHA: weights from the hub, statistics from openpi's bucket, put together on the instance.
  action             = { model_config_name = "pi05_aloha" }
  prepare_checkpoint = true
}

output "server" {
  value = module.server
}
