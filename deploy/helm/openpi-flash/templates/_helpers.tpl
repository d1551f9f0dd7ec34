{{/* Names, labels, the settings file, and what the pods are alike in. */}}

{{- define "openpi-flash.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := .Values.fullnameOverride | default (contains $name .Release.Name | ternary .Release.Name (printf "%s-%s" .Release.Name $name)) -}}
{{- $full | trunc 45 | trimSuffix "-" -}}{{/* room for suffixes: a name has 63 characters at most */}}
{{- end }}

{{/* What does not change over a release's life. Takes the root and the component. */}}
{{- define "openpi-flash.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride | trunc 63 }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{/* Of pods. Versions are not among them: a new chart with the same images replaces no pod. */}}
{{- define "openpi-flash.podLabels" -}}
{{ include "openpi-flash.selectorLabels" . }}
{{- with .root.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{- define "openpi-flash.labels" -}}
{{ include "openpi-flash.podLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* Takes the root and the component's image values. */}}
{{- define "openpi-flash.image" -}}
{{- $all := .root.Values.image -}}
{{- $registry := .image.registry | default $all.registry -}}
{{- if not $registry }}{{ include "openpi-flash.refuse" "image.registry is needed: where `make images REGISTRY=… TAGS=… PUSH=1` has put the images" }}{{ end -}}
{{ printf "%s/%s:%s" $registry .image.repository (.image.tag | default $all.tag | default .root.Chart.AppVersion) }}
{{- end }}

{{- define "openpi-flash.serviceAccountName" -}}
{{- $account := .Values.serviceAccount -}}
{{ $account.name | default ($account.create | ternary (include "openpi-flash.fullname" .) "default") }}
{{- end }}

{{/* Secrets: an existing one, the one that the chart makes, or none (empty). */}}
{{- define "openpi-flash.tlsSecret" -}}
{{ .Values.tls.existingSecret | default (.Values.tls.certificate | empty | ternary "" (printf "%s-tls" (include "openpi-flash.fullname" .))) }}
{{- end }}
{{- define "openpi-flash.authSecret" -}}
{{ .Values.auth.existingSecret | default (.Values.auth.tokens | empty | ternary "" (printf "%s-tokens" (include "openpi-flash.fullname" .))) }}
{{- end }}
{{- define "openpi-flash.hubSecret" -}}
{{ .Values.hub.existingSecret | default (.Values.hub.token | empty | ternary "" (printf "%s-hub" (include "openpi-flash.fullname" .))) }}
{{- end }}

{{/* The settings file, as an object: what is in `config`, and what the chart decides. */}}
{{- define "openpi-flash.config" -}}
{{- $full := include "openpi-flash.fullname" . -}}
{{- $config := deepCopy .Values.config -}}
{{- $gateway := dict "host" "0.0.0.0" "grpc_port" 50051 "action" dict "planner" dict -}}
{{- if include "openpi-flash.tlsSecret" . -}}
  {{- $tls := dict "cert_file" "/etc/openpi-flash-tls/tls.crt" "key_file" "/etc/openpi-flash-tls/tls.key" -}}
  {{- if .Values.tls.clientCaSecret }}{{ $_ := set $tls "client_ca_file" "/etc/openpi-flash-client-ca/ca.crt" }}{{ end -}}
  {{- $_ := set $gateway "tls" $tls -}}
{{- end -}}
{{- if include "openpi-flash.authSecret" . -}}
  {{- $_ := set $gateway "auth" (dict "tokens_file" "/etc/openpi-flash-tokens/tokens") -}}
{{- end -}}
{{- range $name, $port := dict "action" 50052 "planner" 50053 -}}
  {{- $component := index $.Values $name -}}
  {{- if $component.enabled -}}
    {{- $section := mergeOverwrite (index $config $name) (dict "host" "0.0.0.0" "grpc_port" $port) -}}
    {{- if $component.prepare.enabled }}{{ $_ := set $section "checkpoint_dir" $component.prepare.outputDir }}{{ end -}}
    {{- $_ := set $gateway $name (dict "address" (printf "%s-%s.%s.svc:%d" $full $name $.Release.Namespace $port)) -}}
  {{- else -}}
    {{- $_ := unset $config $name -}}
  {{- end -}}
{{- end -}}
{{- $_ := set $config "gateway" (mergeOverwrite $config.gateway $gateway) -}}
{{- $_ := set $config "telemetry" (mergeOverwrite $config.telemetry (dict "metrics" .Values.metrics.enabled "metrics_host" "0.0.0.0")) -}}
{{ toJson $config }}
{{- end }}

{{/* Changes when what a component reads of the settings does. Takes the root and the component. */}}
{{- define "openpi-flash.checksums" -}}
{{- $config := include "openpi-flash.config" .root | fromJson -}}
{{- if ne .component "gateway" }}{{ $config = pick $config .component "telemetry" "log" "pytorch_compile_mode" }}{{ end -}}
checksum/config: {{ list $config .root.Values.policyFiles | toJson | sha256sum }}
{{- if eq .component "gateway" }}
checksum/secrets: {{ list .root.Values.tls .root.Values.auth | toJson | sha256sum }}
{{- end }}
{{- end }}

{{/* Start of every pod's spec. Takes the root and the component's values. */}}
{{- define "openpi-flash.podSpec" -}}
serviceAccountName: {{ include "openpi-flash.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ .values.terminationGracePeriodSeconds }}
securityContext: {{- toYaml .root.Values.podSecurityContext | nindent 2 }}
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- with .values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .values.tolerations | default list -}}
{{- if int (dig "gpu" "count" 0 .values) -}}{{/* nodes with accelerators are often kept for those who ask for one */}}
  {{- $tolerations = append $tolerations (dict "key" .values.gpu.resource "operator" "Exists" "effect" "NoSchedule") -}}
{{- end -}}
{{- with $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .values.topologySpreadConstraints }}
topologySpreadConstraints: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* Of every container. Takes the root and the image's values. */}}
{{- define "openpi-flash.container" -}}
image: {{ include "openpi-flash.image" . }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext: {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
{{- end }}

{{/* A service around a model: its headless Service and its StatefulSet. Takes the root, the component, its image and ports,
and the arguments that prepare its checkpoint. */}}
{{- define "openpi-flash.model" -}}
{{- $values := index .root.Values .component -}}
{{- $full := printf "%s-%s" (include "openpi-flash.fullname" .root) .component -}}
{{- $resources := deepCopy $values.resources -}}
{{- if $values.gpu.count -}}
  {{- $_ := set $resources "limits" (merge (dict $values.gpu.resource $values.gpu.count) ($resources.limits | default dict)) -}}
{{- end -}}
apiVersion: v1
kind: Service
metadata:
  name: {{ $full }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "openpi-flash.labels" . | nindent 4 }}
spec:
  # The gateway finds each replica behind this name, follows its health itself, and spreads the requests.
  clusterIP: None
  publishNotReadyAddresses: true
  selector: {{- include "openpi-flash.selectorLabels" . | nindent 4 }}
  ports:
    - {name: grpc, port: {{ .port }}, targetPort: grpc, appProtocol: kubernetes.io/h2c}
---
apiVersion: apps/v1
kind: StatefulSet
metadata:
  name: {{ $full }}
  namespace: {{ .root.Release.Namespace }}
  labels: {{- include "openpi-flash.labels" . | nindent 4 }}
spec:
  serviceName: {{ $full }}
  {{- if eq (dig "autoscaling" "type" "none" $values) "none" }}
  replicas: {{ $values.replicas }}
  {{- end }}
  # Replicas do not wait for each other. An update replaces one after the other, each when its GPU is free again.
  podManagementPolicy: Parallel
  selector:
    matchLabels: {{- include "openpi-flash.selectorLabels" . | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "openpi-flash.podLabels" . | nindent 8 }}
        {{- with $values.podLabels }}{{ toYaml . | nindent 8 }}{{ end }}
      annotations:
        {{- include "openpi-flash.checksums" . | nindent 8 }}
        {{- with $values.podAnnotations }}{{ toYaml . | nindent 8 }}{{ end }}
    spec:
      {{- include "openpi-flash.podSpec" (dict "root" .root "values" $values) | nindent 6 }}
      {{- if $values.prepare.enabled }}
      initContainers:
        - name: prepare-checkpoint
          {{- include "openpi-flash.container" (dict "root" .root "image" .root.Values.image.tools) | nindent 10 }}
          args: {{- toYaml .prepare | nindent 12 }}
          {{- with include "openpi-flash.hubEnv" .root }}
          env: {{- . | nindent 12 }}
          {{- end }}
          resources: {{- toYaml $values.prepare.resources | nindent 12 }}
          volumeMounts:
            - {name: cache, mountPath: /cache}
            - {name: tmp, mountPath: /tmp}
      {{- end }}
      containers:
        - name: {{ .component }}
          {{- include "openpi-flash.container" . | nindent 10 }}
          env:
            - {{ include "openpi-flash.configEnv" . }}
            {{- with include "openpi-flash.hubEnv" .root }}{{ . | nindent 12 }}{{ end }}
            {{- with $values.extraEnv }}{{ toYaml . | nindent 12 }}{{ end }}
          ports:
            - {name: grpc, containerPort: {{ .port }}}
            {{- if .root.Values.metrics.enabled }}
            - {name: metrics, containerPort: {{ .metricsPort }}}
            {{- end }}
          # A download and five minutes of compilation are a start, not a fault: until then nothing else is asked.
          startupProbe:
            grpc: {port: {{ .port }}, service: {{ .service }}}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: {{ div (add $values.startupTimeoutSeconds 4) 5 }}
          readinessProbe:
            grpc: {port: {{ .port }}, service: {{ .service }}}
            periodSeconds: 5
            timeoutSeconds: 5
            failureThreshold: 2
          # Whether the process answers at all.
          livenessProbe:
            grpc: {port: {{ .port }}, service: liveness}
            periodSeconds: 10
            timeoutSeconds: 10
            failureThreshold: 6
          resources: {{- toYaml $resources | nindent 12 }}
          volumeMounts:
            - {name: config, mountPath: /etc/openpi-flash, readOnly: true}
            - {name: cache, mountPath: /cache}
            - {name: tmp, mountPath: /tmp}
            {{- with $values.extraVolumeMounts }}{{ toYaml . | nindent 12 }}{{ end }}
      volumes:
        - name: config
          configMap: {name: {{ include "openpi-flash.fullname" .root }}}
        - name: tmp
          emptyDir: {}
        {{- if eq $values.cache.type "emptyDir" }}
        - name: cache
          emptyDir: {sizeLimit: {{ $values.cache.size }}}
        {{- else if eq $values.cache.type "existing" }}
        - name: cache
          persistentVolumeClaim: {claimName: {{ $values.cache.existingClaim }}}
        {{- end }}
        {{- with $values.extraVolumes }}{{ toYaml . | nindent 8 }}{{ end }}
  {{- if eq $values.cache.type "pvc" }}
  persistentVolumeClaimRetentionPolicy:
    whenDeleted: {{ $values.cache.whenDeleted }}
    whenScaled: {{ $values.cache.whenScaled }}
  volumeClaimTemplates:
    # What is here cannot be changed later, so versions are not among the labels.
    - metadata:
        name: cache
        labels: {{- include "openpi-flash.selectorLabels" . | nindent 10 }}
      spec:
        accessModes: {{- toYaml $values.cache.accessModes | nindent 10 }}
        {{- with $values.cache.storageClass }}
        storageClassName: {{ . }}
        {{- end }}
        resources: {requests: {storage: {{ $values.cache.size }}}}
  {{- end }}
{{- end }}

{{/* What a service is told beside what its image says: programs, caches and sockets are the image's. */}}
{{- define "openpi-flash.configEnv" -}}
{name: INFERENCE_CONFIG_PATH, value: /etc/openpi-flash/config.json}
{{- end }}

{{/* Of what fetches; empty without a token. */}}
{{- define "openpi-flash.hubEnv" -}}
{{- with include "openpi-flash.hubSecret" . -}}
- name: HF_TOKEN
  valueFrom: {secretKeyRef: {name: {{ . }}, key: token}}
{{- end }}
{{- end }}
