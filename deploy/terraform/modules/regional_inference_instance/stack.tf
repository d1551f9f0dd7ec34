# What the instance runs, worked out from the variables: config.json, one container for each service, and the files that
# cloud-init writes. Containers use the host's network: the instance has no other purpose, QUIC needs no translation of
# addresses, and what config.json binds to loopback (the services behind the gateway, the operators' HTTP) stays there.

locals {
  slots = concat(var.action == null ? [] : ["action"], var.planner == null ? [] : ["planner"])
  mode  = length(local.slots) == 2 ? "combined" : "${local.slots[0]}_only"

  defaults = {
    action  = { websocket_port = 8000, quic_port = 5555 }
    planner = { websocket_port = 8002, quic_port = 5556 }
  }

  transport = {
    for slot in local.slots : slot => merge(
      local.defaults[slot],
      { unix_socket_path = "${local.socket_dir}/${slot}.sock" },
      try(var.extra_config["${slot}_transport"], {}),
    )
  }

  gateway_settings = try(var.extra_config.gateway, {})
  grpc_port        = try(local.gateway_settings.grpc_port, 50051)

  # Exactly what robots may reach. Anything else that listens, such as 8001 for operators, is closed.
  open_ports = merge({ grpc = { protocol = "tcp", port = local.grpc_port } }, [
    for slot in local.slots : {
      "${slot}-websocket" = { protocol = "tcp", port = local.transport[slot].websocket_port }
      "${slot}-quic"      = { protocol = "udp", port = local.transport[slot].quic_port }
    }
  ]...)

  # Paths, the same on the host and in the containers, except for /cache.
  etc_dir    = "/etc/openpi-flash"
  cache_dir  = "/var/lib/openpi-flash/cache"
  run_dir    = "/run/openpi-flash"
  socket_dir = "${local.run_dir}/sockets"
  secret_dir = "${local.run_dir}/secrets"
  user_id    = 10001

  secrets = { for name, parameter in {
    tokens        = var.auth_tokens_parameter
    "hf-token"    = var.hf_token_parameter
    "tls.crt"     = try(var.tls.certificate_parameter, null)
    "tls.key"     = try(var.tls.private_key_parameter, null)
    "clients.crt" = try(var.tls.client_ca_parameter, null)
  } : name => parameter if parameter != null }
  secret_file = { for name in keys(local.secrets) : name => "${local.secret_dir}/${name}" }

  config = merge(
    var.extra_config,
    { for slot, transport in local.transport : "${slot}_transport" => transport },
    { for slot, settings in { action = var.action, planner = var.planner } :
      slot => merge(settings, { for dir in [local.prepared[slot]] : "checkpoint_dir" => dir if dir != null }) if settings != null
    },
    {
      data_home = "/cache/openpi"
      gateway = merge(
        local.gateway_settings,
        { for path in [lookup(local.secret_file, "tokens", null)] : "auth" => { tokens_file = path } if path != null },
        { for cert in [lookup(local.secret_file, "tls.crt", null)] : "tls" => merge(
          { cert_file = cert, key_file = local.secret_file["tls.key"] },
          { for ca in [lookup(local.secret_file, "clients.crt", null)] : "client_ca_file" => ca if ca != null },
        ) if cert != null },
      )
    },
  )

  # Where the checkpoints lie that are put together here.
  prepared = {
    action  = var.prepare_checkpoint ? var.prep_output_dir : null
    planner = var.prepare_planner_checkpoint ? var.planner_prep_output_dir : null
  }

  slot_image = { action = "action-${var.action_backend}", planner = "planner" }
  image = { for image in concat([for slot in local.slots : local.slot_image[slot]], ["gateway", "edge"]) :
    image => "${var.image_registry}/${image}${can(var.image_digests[image]) ? "@${var.image_digests[image]}" : ":${var.image_tag}"}"
  }

  # docker's arguments that every container has.
  confined = [
    "--rm", "--log-driver", "none", # what they say goes to the journal
    "--user", "${local.user_id}:${local.user_id}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
    "--read-only", "--tmpfs", "/tmp:rw,nosuid,nodev,size=1g",
    "--mount", "type=bind,src=${local.etc_dir},dst=${local.etc_dir},readonly",
    "--mount", "type=bind,src=${local.secret_dir},dst=${local.secret_dir},readonly",
    "--mount", "type=bind,src=${local.socket_dir},dst=${local.socket_dir}",
    "--mount", "type=bind,src=${local.cache_dir},dst=/cache",
    "--pull", "never", # openpi-flash-prepare pulls
  ]

  # The user of the containers has no home and no name in their images.
  common_environment = {
    HOME                  = "/cache"
    USER                  = "openpi"
    XDG_CACHE_HOME        = "/cache/xdg"
    HF_HOME               = "/cache/huggingface"
    INFERENCE_CONFIG_PATH = "${local.etc_dir}/config.json"
  }
  hub_environment = { for path in [lookup(local.secret_file, "hf-token", null)] : "HF_TOKEN_PATH" => path if path != null }
  model_environment = merge(local.common_environment, local.hub_environment, {
    TORCHINDUCTOR_CACHE_DIR       = "/cache/torchinductor"
    TRITON_CACHE_DIR              = "/cache/triton"
    JAX_COMPILATION_CACHE_DIR     = "/cache/jax"
    XLA_PYTHON_CLIENT_PREALLOCATE = "false" # two services may share one GPU
  }, var.environment)

  # The edge has no config.json: the same variables as `openpi-flash serve` gives it.
  edge_environment = { for name, value in merge(
    {
      OPENPI_FLASH_STATE_DIR           = "/cache/edge"
      OPENPI_FLASH_NAMES               = "localhost,127.0.0.1,${aws_eip.this.public_ip}"
      OPENPI_FLASH_MAX_MESSAGE_BYTES   = try(min(local.gateway_settings.max_message_bytes, 64 * 1024 * 1024), null)
      OPENPI_FLASH_MAX_IN_FLIGHT       = try(local.gateway_settings.max_in_flight, 64)
      OPENPI_FLASH_DEFAULT_TIMEOUT_MS  = try(local.gateway_settings.default_timeout_ms, null)
      OPENPI_FLASH_TOKENS_FILE         = lookup(local.secret_file, "tokens", null)
      OPENPI_FLASH_UPSTREAM_TOKEN_FILE = lookup(local.secret_file, "tokens", null)
      OPENPI_FLASH_CERT_FILE           = lookup(local.secret_file, "tls.crt", null)
      OPENPI_FLASH_KEY_FILE            = lookup(local.secret_file, "tls.key", null)
      OPENPI_FLASH_CLIENT_CA_FILE      = lookup(local.secret_file, "clients.crt", null)
    },
    [for slot in local.slots : {
      "OPENPI_FLASH_${upper(slot)}_UPSTREAM" = "unix:${local.transport[slot].unix_socket_path}"
      "OPENPI_FLASH_${upper(slot)}_LISTEN"   = "0.0.0.0:${local.transport[slot].quic_port}"
    }]...
  ) : name => value if value != null }

  services = merge(
    { for slot in local.slots : slot => {
      description = slot == "action" ? "action policy" : "subtask planner"
      image       = local.image[local.slot_image[slot]]
      after       = []
      environment = merge(local.model_environment, { for mode in [var.pytorch_compile_mode] :
        "OPENPI_PYTORCH_COMPILE_MODE" => mode if slot == "action" && mode != null
      })
      options = ["--gpus", "all"]
      command = ["python", "-m", "openpi_flash_${slot}"]
    } },
    {
      gateway = {
        description = "gateway: WebSocket and gRPC for robots"
        image       = local.image["gateway"]
        after       = local.slots # and so is stopped before them
        environment = local.common_environment
        options     = []
        command     = ["python", "-m", "openpi_flash_gateway"]
      }
      edge = {
        description = "edge: QUIC for robots"
        image       = local.image["edge"]
        after       = ["gateway"]
        environment = local.edge_environment
        options     = []
        command     = ["openpi-flash-transport", "--log-format", try(var.extra_config.log.format, "text"), "server"]
      }
    },
  )

  # For each slot whose checkpoint is put together here, docker's arguments, one a line.
  preparations = {
    action = concat(
      ["prepare-checkpoint", "--output-dir", var.prep_output_dir],
      var.prep_hf_repo == null ? [] : ["--hf-repo", var.prep_hf_repo],
      var.prep_assets_uri == null ? [] : ["--assets-uri", var.prep_assets_uri],
      flatten([for id in var.prep_required_asset_ids : ["--required-asset-id", id]]),
    )
    planner = [
      "prepare-planner-checkpoint", "--output-dir", var.planner_prep_output_dir,
      "--hf-repo", var.planner_prep_hf_repo, "--tar-path-in-repo", var.planner_prep_tar_path_in_repo,
    ]
  }
  preparation_files = { for slot, arguments in local.preparations :
    "${local.etc_dir}/prepare.d/${slot}" => join("\n", concat(
      local.confined,
      flatten([for name, value in merge(local.common_environment, local.hub_environment) : ["--env", "${name}=${value}"]]),
      ["--entrypoint", "openpi-flash", local.image[local.slot_image[slot]]],
      arguments,
      [""],
    )) if local.prepared[slot] != null
  }

  registry_host = split("/", var.image_registry)[0]
  ecr_region    = try(regex("^[0-9]{12}\\.dkr\\.ecr\\.([a-z0-9-]+)\\.amazonaws\\.com", local.registry_host)[0], "")

  unit_files = merge(
    { for name, service in local.services :
      "/etc/systemd/system/openpi-flash-${name}.service" => templatefile("${path.module}/templates/service.tftpl", {
        name        = "openpi-flash-${name}"
        description = service.description
        after       = [for unit in service.after : "openpi-flash-${unit}.service"]
        arguments = concat(
          local.confined,
          ["--network", "host"],
          service.options,
          [for name, value in service.environment : "--env ${name}=${value}"],
          ["--entrypoint ${service.command[0]}", service.image],
          slice(service.command, 1, length(service.command)),
        )
      })
    },
    {
      "/etc/systemd/system/openpi-flash-prepare.service" = file("${path.module}/files/openpi-flash-prepare.service")
      "/etc/systemd/system/openpi-flash.target" = templatefile("${path.module}/templates/target.tftpl", {
        mode     = local.mode
        services = keys(local.services)
      })
    },
  )

  files = merge(local.unit_files, local.preparation_files, {
    "${local.etc_dir}/config.json" = "${jsonencode(local.config)}\n"
    "${local.etc_dir}/images"      = "${join("\n", values(local.image))}\n"
    "${local.etc_dir}/secrets"     = join("", [for name, parameter in local.secrets : "${name} ${parameter}\n"])
    "${local.etc_dir}/stack.env" = join("", [for name, value in {
      REGION        = data.aws_region.current.name
      REGISTRY_HOST = local.registry_host
      ECR_REGION    = local.ecr_region
      USER_ID       = local.user_id
    } : "${name}=${value}\n"])
  })

  user_data = "#cloud-config\n${yamlencode({
    write_files = concat(
      [for path, content in local.files : { path = path, content = content, permissions = "0644" }],
      [{
        path        = "/usr/local/lib/openpi-flash/prepare"
        content     = file("${path.module}/files/prepare")
        permissions = "0755"
      }],
    )
    runcmd = [
      ["systemctl", "daemon-reload"],
      ["systemctl", "enable", "openpi-flash.target"],
      ["systemctl", "start", "--no-block", "openpi-flash.target"],
    ]
  })}"
}
