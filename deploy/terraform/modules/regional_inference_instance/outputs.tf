output "mode" {
  description = "action_only, planner_only or combined."
  value       = local.mode
}

output "public_ip" {
  description = "Address of the server; stays when the instance is replaced."
  value       = aws_eip.this.public_ip
}

output "instance_id" {
  description = "Changes when the instance is replaced."
  value       = aws_instance.this.id
}

output "open_ports" {
  description = "What the security group lets in."
  value       = { for name, open in local.open_ports : name => "${open.port}/${open.protocol}" }
}

output "commands" {
  description = "How to call the server, and how to look after it. FINGERPRINT and TOKEN stand for what `logs` shows and what auth_tokens_parameter holds; ca.pem for the certificate's CA."
  value = merge(
    {
      grpc = join(" ", compact([
        "openpi-flash test grpc ${aws_eip.this.public_ip} --port ${local.grpc_port}",
        var.tls == null ? "--insecure-plaintext" : "--ca-file ca.pem",
        local.token_option,
      ]))
      shell   = "aws ssm start-session --region ${data.aws_region.current.name} --target ${aws_instance.this.id}"
      logs    = "journalctl --follow --unit 'openpi-flash*'"
      restart = "sudo systemctl restart openpi-flash.target"
    },
    [for slot in local.slots : {
      "${slot}_websocket" = join(" ", compact([
        "openpi-flash test ws ${aws_eip.this.public_ip} --port ${local.transport[slot].websocket_port}",
        local.robot_option[slot],
        var.tls == null ? "" : "--ca-file ca.pem",
        local.token_option,
      ]))
      "${slot}_quic" = join(" ", compact([
        "openpi-flash test quic ${aws_eip.this.public_ip} --port ${local.transport[slot].quic_port}",
        var.tls == null ? "--fingerprint FINGERPRINT" : "--ca-file ca.pem",
        local.token_option,
      ]))
    }]...
  )
}

locals {
  token_option = var.auth_tokens_parameter == null ? "" : "--token TOKEN"
  # Over WebSocket a server does not say what it takes. Empty: a policy file, whose robot is not in its name.
  robot_option = { for slot, settings in { action = var.action, planner = var.planner } :
    slot => try("--robot ${regex("aloha|droid|libero", settings.model_config_name)}", "")
  }
}
