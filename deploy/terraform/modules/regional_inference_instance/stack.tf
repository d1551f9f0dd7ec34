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

  # Folders of the host, and where the containers see them.
  folders = {
    etc     = { host = "/etc/openpi-flash", container = "/etc/openpi-flash", readonly = true }
    secrets = { host = "/run/openpi-flash/secrets", container = "/run/secrets", readonly = true }
    sockets = { host = "/run/openpi-flash/sockets", container = "/run/openpi-flash", readonly = false }
    cache   = { host = "/var/lib/openpi-flash/cache", container = "/cache", readonly = false }
  }
  etc_dir = local.folders.etc.host
  user_id = 10001 # that of the images

  secrets = { for name, parameter in {
    tokens        = var.auth_tokens_parameter
    "hf-token"    = var.hf_token_parameter
    "tls.crt"     = try(var.tls.certificate_parameter, null)
    "tls.key"     = try(var.tls.private_key_parameter, null)
    "clients.crt" = try(var.tls.client_ca_parameter, null)
  } : name => parameter if parameter != null }
  secret_file = { for name in keys(local.secrets) : name => "${local.folders.secrets.container}/${name}" }

  config = merge(
    var.extra_config,
    { for slot, transport in local.transport : "${slot}_transport" => transport },
    { for slot, settings in { action = var.action, planner = var.planner } :
      slot => merge(settings, { for dir in [local.prepared[slot]] : "checkpoint_dir" => dir if dir != null }) if settings != null
    },
    {
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

  slot_image = {
    action  = "action-${var.action_backend}${var.pytorch_compile_mode == null ? "" : "-compile"}"
    planner = "planner"
  }
  services = merge(
    { for slot in local.slots : slot => {
      description = slot == "action" ? "action policy" : "subtask planner"
      image       = local.slot_image[slot]
      after       = []
      options     = ["--gpus", "all"]
      environment = merge(local.hub_environment, var.environment, { for mode in [var.pytorch_compile_mode] :
        "OPENPI_PYTORCH_COMPILE_MODE" => mode if slot == "action" && mode != null
      })
    } },
    {
      gateway = {
        description = "gateway: WebSocket and gRPC for robots"
        image       = "gateway"
        after       = local.slots # and so is stopped before them
        options     = []
        environment = {}
      }
      edge = {
        description = "edge: QUIC for robots"
        image       = "edge"
        after       = ["gateway"]
        options     = []
        environment = {
          OPENPI_FLASH_STATE_DIR = "/cache/edge" # its certificate outlives a restart
          OPENPI_FLASH_NAMES     = "localhost,127.0.0.1,${aws_eip.this.public_ip}"
        }
      }
    },
  )
  hub_environment = { for path in [lookup(local.secret_file, "hf-token", null)] : "HF_TOKEN_PATH" => path if path != null }

  image = { for image in concat(values(local.services)[*].image, var.prepare_checkpoint || var.prepare_planner_checkpoint ? ["tools"] : []) :
    image => "${var.image_registry}/${image}${can(var.image_digests[image]) ? "@${var.image_digests[image]}" : ":${var.image_tag}"}"
  }

  # docker's arguments that every container has.
  confined = concat(
    [
      "--rm", "--log-driver", "none", # what they say goes to the journal
      "--user", "${local.user_id}:${local.user_id}", "--cap-drop", "ALL", "--security-opt", "no-new-privileges",
      "--read-only", "--tmpfs", "/tmp",
      "--pull", "never", # openpi-flash-prepare pulls
      "--env", "INFERENCE_CONFIG_PATH=${local.folders.etc.container}/config.json",
    ],
    flatten([for folder in values(local.folders) :
      ["--mount", "type=bind,src=${folder.host},dst=${folder.container}${folder.readonly ? ",readonly" : ""}"]
    ]),
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
      flatten([for name, value in local.hub_environment : ["--env", "${name}=${value}"]]),
      [local.image["tools"]],
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
          flatten([for name, value in service.environment : ["--env", "${name}=${value}"]]),
          [local.image[service.image]],
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
