# Where

variable "name" {
  description = "Name of the instance and prefix of what belongs to it; unique within a region."
  type        = string
  default     = "openpi-flash"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,40}$", var.name))
    error_message = "name: 2 to 41 lower-case letters, digits and hyphens, a letter first."
  }
}

variable "subnet_id" {
  description = "Public subnet (one with a route to an internet gateway), in a zone that offers the instance type."
  type        = string

  validation {
    condition     = can(regex("^subnet-[0-9a-f]+$", var.subnet_id))
    error_message = "subnet_id: expected a subnet's id, such as subnet-0123456789abcdef0."
  }
}

variable "client_cidr_blocks" {
  description = "IPv4 networks of the robots; nobody else reaches a port. 0.0.0.0/0 needs auth_tokens_parameter."
  type        = list(string)

  validation {
    condition     = length(var.client_cidr_blocks) > 0 && alltrue([for block in var.client_cidr_blocks : can(cidrnetmask(block))])
    error_message = "client_cidr_blocks: at least one IPv4 network is needed, each such as 203.0.113.0/24 or 203.0.113.7/32."
  }

  validation {
    condition     = !contains(var.client_cidr_blocks, "0.0.0.0/0") || var.auth_tokens_parameter != null
    error_message = "client_cidr_blocks: 0.0.0.0/0 lets the whole internet in; set auth_tokens_parameter, so that a token is asked for, or name the robots' networks."
  }
}

# The machine

variable "instance_type" {
  description = "A type with an NVIDIA GPU. Ampere or newer (g5, g6, g6e, p4d, p5): the models compute in bfloat16."
  type        = string
  default     = "g6e.xlarge"

  validation {
    condition     = can(regex("^(g[4-9][a-z]*|gr[0-9]+|p[3-9][a-z]*)\\.[a-z0-9-]+$", var.instance_type)) && !can(regex("^g(4ad|5g)\\.", var.instance_type))
    error_message = "instance_type: expected a type with an NVIDIA GPU and an x86_64 processor, such as g6e.xlarge."
  }
}

variable "ami_id" {
  description = "Image with Docker, the NVIDIA driver and container toolkit, and the AWS command line; null: the newest Deep Learning Base AMI at the time the instance is made."
  type        = string
  default     = null

  validation {
    condition     = var.ami_id == null || can(regex("^ami-[0-9a-f]+$", var.ami_id))
    error_message = "ami_id: expected an image's id, such as ami-0123456789abcdef0."
  }
}

variable "instance_profile" {
  description = "Instance profile that may pull the images and read the parameters: output of ../../shared."
  type        = string
}

variable "root_volume" {
  description = "Encrypted root volume: images, checkpoints and compile caches lie there. Null of iops and throughput: the type's own; of kms_key_id: the account's key."
  type = object({
    size_gib   = optional(number, 200)
    type       = optional(string, "gp3")
    iops       = optional(number)
    throughput = optional(number)
    kms_key_id = optional(string)
  })
  default = {}

  validation {
    condition     = var.root_volume.size_gib >= 100
    error_message = "root_volume.size_gib: at least 100; the images and one checkpoint alone take about 60."
  }

  validation {
    condition     = contains(["gp2", "gp3", "io1", "io2"], var.root_volume.type)
    error_message = "root_volume.type: expected gp2, gp3, io1 or io2."
  }

  validation {
    condition     = var.root_volume.throughput == null || var.root_volume.type == "gp3"
    error_message = "root_volume.throughput: only gp3 has one to set."
  }

  validation {
    condition     = var.root_volume.iops == null ? !contains(["io1", "io2"], var.root_volume.type) : var.root_volume.type != "gp2"
    error_message = "root_volume.iops: io1 and io2 need it, gp2 has none to set."
  }
}

variable "spot" {
  description = "Set: a spot instance, which is cheaper and may be taken away with two minutes' notice; the next apply makes another at the same address. Null of max_price_usd: up to the price on demand."
  type        = object({ max_price_usd = optional(number) })
  default     = null

  validation {
    condition     = try(var.spot.max_price_usd, null) == null || try(var.spot.max_price_usd > 0, false)
    error_message = "spot.max_price_usd: expected a price per hour above 0, in US dollars."
  }
}

variable "tags" {
  description = "Tags of everything here."
  type        = map(string)
  default     = {}
}

# The images

variable "image_registry" {
  description = "Prefix of the images, without a slash at the end: output of ../../shared."
  type        = string

  validation {
    condition     = can(regex("^[a-z0-9][a-z0-9._:-]*(/[a-z0-9._-]+)+$", var.image_registry))
    error_message = "image_registry: expected host/prefix without a slash at the end, such as 123456789012.dkr.ecr.us-west-2.amazonaws.com/openpi-flash."
  }
}

variable "image_tag" {
  description = "Tag of images that image_digests does not name."
  type        = string
  default     = "latest"

  validation {
    condition     = can(regex("^[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}$", var.image_tag))
    error_message = "image_tag: not a tag of an image."
  }
}

variable "image_digests" {
  description = "Digests by image (`gateway = \"sha256:…\"`), which pin exactly what runs, whatever becomes of the tags."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for image in keys(var.image_digests) : contains(["action-torch", "action-torch-compile", "action-jax", "planner", "gateway", "edge", "tools"], image)])
    error_message = "image_digests: the images are action-torch, action-torch-compile, action-jax, planner, gateway, edge and tools."
  }

  validation {
    condition     = alltrue([for digest in values(var.image_digests) : can(regex("^sha256:[0-9a-f]{64}$", digest))])
    error_message = "image_digests: expected sha256: and 64 hexadecimal digits."
  }
}

# What is served: the sections of config.json, which docs/configuration.md lists. The mode follows from which are set.

variable "action" {
  description = "Section `action` of config.json; null: no action policy. checkpoint_dir may be left out with prepare_checkpoint."
  type        = any
  default     = null

  validation {
    condition     = var.action == null || can(var.action.model_config_name)
    error_message = "action.model_config_name: required, such as \"pi05_droid\"."
  }

  validation {
    condition     = var.action == null || can(var.action.checkpoint_dir) != var.prepare_checkpoint
    error_message = "action.checkpoint_dir: either name a checkpoint (gs://… or hf://…), or have one made by prepare_checkpoint, which then sets it."
  }

  validation {
    condition     = var.action != null || !var.prepare_checkpoint
    error_message = "prepare_checkpoint: there is no action policy to prepare a checkpoint for."
  }
}

variable "planner" {
  description = "Section `planner` of config.json; null: no planner. checkpoint_dir may be left out with prepare_planner_checkpoint."
  type        = any
  default     = null

  validation {
    condition     = var.action != null || var.planner != null
    error_message = "Nothing to serve: set action, planner, or both."
  }

  validation {
    condition     = var.planner == null || can(var.planner.checkpoint_dir) != var.prepare_planner_checkpoint
    error_message = "planner.checkpoint_dir: either name a checkpoint (gs://… or hf://…), or have one made by prepare_planner_checkpoint, which then sets it."
  }

  validation {
    condition     = var.planner != null || !var.prepare_planner_checkpoint
    error_message = "prepare_planner_checkpoint: there is no planner to prepare a checkpoint for."
  }
}

variable "extra_config" {
  description = "Further sections of config.json: action_transport, planner_transport, gateway, telemetry, log."
  type        = any
  default     = {}

  validation {
    condition     = alltrue([for section in keys(var.extra_config) : contains(["action_transport", "planner_transport", "gateway", "telemetry", "log"], section)])
    error_message = "extra_config: the sections are action_transport, planner_transport, gateway, telemetry and log; action and planner are variables of their own."
  }

  validation {
    condition     = alltrue([for slot in ["action", "planner"] : !can(var.extra_config["${slot}_transport"].unix_socket_path)])
    error_message = "extra_config: unix_socket_path is the images' own: gateway and edge, each a container, meet there."
  }

  validation {
    condition     = !can(var.extra_config.gateway.auth) && !can(var.extra_config.gateway.tls)
    error_message = "extra_config.gateway: tokens and certificates come from Parameter Store: see auth_tokens_parameter and tls."
  }
}

variable "action_backend" {
  description = "`torch` or `jax`: which image runs the action policy. PyTorch serves model.safetensors, JAX serves params/."
  type        = string
  default     = "torch"

  validation {
    condition     = contains(["torch", "jax"], var.action_backend)
    error_message = "action_backend: expected torch or jax."
  }

  validation {
    condition     = var.action_backend != "jax" || !var.prepare_checkpoint || var.prep_hf_repo != null
    error_message = "action_backend: jax serves params/, and the default repository of prepare_checkpoint holds model.safetensors: set prep_hf_repo."
  }
}

variable "pytorch_compile_mode" {
  description = "Mode of torch.compile (OPENPI_PYTORCH_COMPILE_MODE); null: not compiled."
  type        = string
  default     = null

  validation {
    condition     = var.pytorch_compile_mode == null || contains(["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"], coalesce(var.pytorch_compile_mode, "default"))
    error_message = "pytorch_compile_mode: expected default, reduce-overhead, max-autotune or max-autotune-no-cudagraphs."
  }

  validation {
    condition     = var.pytorch_compile_mode == null || var.action_backend == "torch"
    error_message = "pytorch_compile_mode: JAX always compiles; this is for action_backend torch."
  }
}

variable "environment" {
  description = "Further environment of the action and planner services, such as XLA_PYTHON_CLIENT_MEM_FRACTION. No secrets: it is readable in the instance's user data."
  type        = map(string)
  default     = {}

  validation {
    condition     = alltrue([for key, value in var.environment : can(regex("^[A-Z_][A-Z0-9_]*$", key)) && !can(regex("[\\s\"'\\\\%$]", value))])
    error_message = "environment: names are upper-case letters, digits and underscores; values hold no spaces, quotes, backslashes, % or $."
  }
}

# Checkpoints that are put together on the instance

variable "prepare_checkpoint" {
  description = "Run `openpi-flash prepare-checkpoint` before the services start."
  type        = bool
  default     = false
}

variable "prep_hf_repo" {
  description = "`org/repo[/folder][@revision]` of the weights; null: the command's own default."
  type        = string
  default     = null

  validation {
    condition     = var.prep_hf_repo == null || can(regex("^[\\w.-]+/[\\w./@-]+$", var.prep_hf_repo))
    error_message = "prep_hf_repo: expected org/repo; a folder and @revision may follow."
  }
}

variable "prep_assets_uri" {
  description = "gs:// or hf:// folder of the normalisation statistics; null: the command's own default."
  type        = string
  default     = null

  validation {
    condition     = var.prep_assets_uri == null || can(regex("^(gs|hf)://\\S+$", var.prep_assets_uri))
    error_message = "prep_assets_uri: expected gs://… or hf://…."
  }
}

variable "prep_required_asset_ids" {
  description = "Robots whose statistics must be there; empty: the command's own default."
  type        = list(string)
  default     = []
}

variable "prep_output_dir" {
  description = "Where the checkpoint is put, below /cache of the containers."
  type        = string
  default     = "/cache/checkpoints/action"

  validation {
    condition     = can(regex("^/cache/[\\w-][\\w./-]*$", var.prep_output_dir)) && !strcontains(var.prep_output_dir, "..")
    error_message = "prep_output_dir: expected a path below /cache/."
  }
}

variable "prepare_planner_checkpoint" {
  description = "Run `openpi-flash prepare-planner-checkpoint` before the services start."
  type        = bool
  default     = false
}

variable "planner_prep_hf_repo" {
  description = "`org/repo[@revision]` that holds the planner's archive."
  type        = string
  default     = "Hebbian-Robotics/pi05_subtask"

  validation {
    condition     = can(regex("^[\\w.-]+/[\\w.-]+(@[\\w./-]+)?$", var.planner_prep_hf_repo))
    error_message = "planner_prep_hf_repo: expected org/repo; @revision may follow."
  }
}

variable "planner_prep_tar_path_in_repo" {
  description = "Path of the tar in that repository."
  type        = string
  default     = "jax/pi05_subtask.tar"

  validation {
    condition     = can(regex("^[\\w./-]+\\.tar$", var.planner_prep_tar_path_in_repo))
    error_message = "planner_prep_tar_path_in_repo: expected the path of an uncompressed .tar, such as jax/pi05_subtask.tar."
  }
}

variable "planner_prep_output_dir" {
  description = "Where the planner's checkpoint is put, below /cache of the containers."
  type        = string
  default     = "/cache/checkpoints/planner"

  validation {
    condition     = can(regex("^/cache/[\\w-][\\w./-]*$", var.planner_prep_output_dir)) && !strcontains(var.planner_prep_output_dir, "..") && var.planner_prep_output_dir != var.prep_output_dir
    error_message = "planner_prep_output_dir: expected a path below /cache/, other than prep_output_dir."
  }
}

# Secrets: names of parameters in Parameter Store of the instance's region. Their values never pass through Terraform.

variable "auth_tokens_parameter" {
  description = "SecureString with the accepted bearer tokens, one a line; null: no token is asked for."
  type        = string
  default     = null

  validation {
    condition     = var.auth_tokens_parameter == null || can(regex("^/[\\w./-]+$", var.auth_tokens_parameter))
    error_message = "auth_tokens_parameter: expected a parameter's name, such as /openpi-flash/tokens."
  }
}

variable "hf_token_parameter" {
  description = "SecureString with the Hugging Face token, for repositories that are not public; null: none."
  type        = string
  default     = null

  validation {
    condition     = var.hf_token_parameter == null || can(regex("^/[\\w./-]+$", var.hf_token_parameter))
    error_message = "hf_token_parameter: expected a parameter's name, such as /openpi-flash/hf-token."
  }
}

variable "tls" {
  description = "Parameters with the server's certificate chain and private key (PEM), and the CA of robots' certificates where robots must have one; null: plain text, and over QUIC a self-signed certificate."
  type = object({
    certificate_parameter = string
    private_key_parameter = string
    client_ca_parameter   = optional(string)
  })
  default = null

  validation {
    condition     = var.tls == null || alltrue([for name in values(coalesce(var.tls, {})) : name == null || can(regex("^/[\\w./-]+$", name))])
    error_message = "tls: expected parameters' names, such as /openpi-flash/tls-certificate."
  }
}
