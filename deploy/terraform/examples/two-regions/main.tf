# Two servers, each near its robots, from the same images: combined with a planner in Oregon, actions alone in Frankfurt.

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
  alias  = "oregon"
  region = "us-west-2"
}

provider "aws" {
  alias  = "frankfurt"
  region = "eu-central-1"
}

variable "image_registry" {
  description = "Output of ../../shared."
  type        = string
}

variable "instance_profile" {
  description = "Output of ../../shared."
  type        = string
}

variable "image_digests" {
  description = "Digests by image: both regions run exactly the same."
  type        = map(string)
  default     = {}
}

variable "sites" {
  description = "Public subnet and the robots' networks, of `oregon` and `frankfurt`."
  type        = map(object({ subnet_id = string, client_cidr_blocks = list(string) }))

  validation {
    condition     = toset(keys(var.sites)) == toset(["frankfurt", "oregon"])
    error_message = "sites: expected frankfurt and oregon."
  }
}

module "oregon" {
  source    = "../../modules/regional_inference_instance"
  providers = { aws = aws.oregon }

  subnet_id          = var.sites.oregon.subnet_id
  client_cidr_blocks = var.sites.oregon.client_cidr_blocks
  image_registry     = var.image_registry
  image_digests      = var.image_digests
  instance_profile   = var.instance_profile

  # Two models share one GPU of 48 GB.
  instance_type              = "g6e.2xlarge"
  action                     = { model_config_name = "pi05_aloha" }
  prepare_checkpoint         = true
  planner                    = { cadence = "background" }
  prepare_planner_checkpoint = true
}

module "frankfurt" {
  source    = "../../modules/regional_inference_instance"
  providers = { aws = aws.frankfurt }

  subnet_id          = var.sites.frankfurt.subnet_id
  client_cidr_blocks = var.sites.frankfurt.client_cidr_blocks
  image_registry     = var.image_registry
  image_digests      = var.image_digests
  instance_profile   = var.instance_profile

  action_backend = "jax"
  action = {
    model_config_name = "pi05_droid"
    checkpoint_dir    = "gs://openpi-assets/checkpoints/pi05_droid"
  }
}

output "oregon" {
  value = module.oregon
}

output "frankfurt" {
  value = module.frankfurt
}
