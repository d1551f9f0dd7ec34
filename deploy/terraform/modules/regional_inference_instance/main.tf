# One GPU instance behind a fixed address, with exactly the ports of what it serves.

data "aws_region" "current" {}

data "aws_subnet" "this" {
  id = var.subnet_id
}

data "aws_ami" "gpu" {
  count = var.ami_id == null ? 1 : 0

  most_recent = true
  owners      = ["amazon"]

  filter {
    name   = "name"
    values = ["Deep Learning Base OSS Nvidia Driver GPU AMI (Ubuntu 22.04) *"]
  }

  filter {
    name   = "architecture"
    values = ["x86_64"]
  }
}

locals {
  tags = merge({ Name = var.name }, var.tags)

  rules = merge([
    for name, open in local.open_ports : {
      for block in var.client_cidr_blocks : "${name} from ${block}" => merge(open, { cidr = block })
    }
  ]...)
}

resource "aws_security_group" "this" {
  name_prefix = "${var.name}-"
  description = "openpi-flash: what robots may reach"
  vpc_id      = data.aws_subnet.this.vpc_id
  tags        = local.tags

  lifecycle {
    create_before_destroy = true
  }
}

resource "aws_vpc_security_group_ingress_rule" "robots" {
  for_each = local.rules

  security_group_id = aws_security_group.this.id
  description       = each.key
  ip_protocol       = each.value.protocol
  from_port         = each.value.port
  to_port           = each.value.port
  cidr_ipv4         = each.value.cidr
  tags              = local.tags
}

resource "aws_vpc_security_group_egress_rule" "all" {
  security_group_id = aws_security_group.this.id
  description       = "images, checkpoints, traces"
  ip_protocol       = "-1"
  cidr_ipv4         = "0.0.0.0/0"
  tags              = local.tags
}

# Outlives the instance, so that another one in its place is found where it was.
resource "aws_eip" "this" {
  domain = "vpc"
  tags   = local.tags
}

resource "aws_eip_association" "this" {
  allocation_id = aws_eip.this.id
  instance_id   = aws_instance.this.id
}

resource "aws_instance" "this" {
  ami                         = var.ami_id == null ? data.aws_ami.gpu[0].id : var.ami_id
  instance_type               = var.instance_type
  iam_instance_profile        = var.instance_profile
  subnet_id                   = var.subnet_id
  vpc_security_group_ids      = [aws_security_group.this.id]
  user_data_base64            = base64gzip(local.user_data) # 16 KiB are allowed
  user_data_replace_on_change = true
  tags                        = local.tags
  volume_tags                 = local.tags

  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  root_block_device {
    encrypted   = true
    kms_key_id  = var.root_volume.kms_key_id
    volume_size = var.root_volume.size_gib
    volume_type = var.root_volume.type
    iops        = var.root_volume.iops
    throughput  = var.root_volume.throughput
  }

  # One-time: a persistent request would start instances that Terraform knows nothing of.
  dynamic "instance_market_options" {
    for_each = var.spot == null ? [] : [var.spot]

    content {
      market_type = "spot"

      spot_options {
        max_price                      = try(tostring(instance_market_options.value.max_price_usd), null)
        spot_instance_type             = "one-time"
        instance_interruption_behavior = "terminate"
      }
    }
  }

  lifecycle {
    # A newer image is no reason to replace a server that robots depend on; -replace takes it.
    ignore_changes = [ami]
  }

  # The network must be there when images are pulled.
  depends_on = [aws_vpc_security_group_egress_rule.all]
}
