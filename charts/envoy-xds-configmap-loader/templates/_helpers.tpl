{{/* Names, labels and images. */}}
{{- define "xds.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "xds.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 50 | trimSuffix "-" }}
{{- else if contains (include "xds.name" .) .Release.Name }}{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (include "xds.name" .) | trunc 50 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "xds.selectorLabels" -}}
app.kubernetes.io/name: {{ include "xds.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: envoy
{{- end }}

{{- define "xds.testLabels" -}}
app.kubernetes.io/name: {{ include "xds.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: test
{{- end }}

{{/* Labels of an object; call with (dict "root" $ "component" "..." "labels" (dict ...)). */}}
{{- define "xds.labels" -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" | trunc 63)
  "app.kubernetes.io/name" (include "xds.name" .root)
  "app.kubernetes.io/instance" .root.Release.Name
  "app.kubernetes.io/component" (.component | default "envoy")
  "app.kubernetes.io/version" (.root.Chart.AppVersion | toString)
  "app.kubernetes.io/managed-by" .root.Release.Service }}
{{- toYaml (mergeOverwrite (dict) .root.Values.commonLabels (.labels | default dict) $own) }}
{{- end }}

{{/* `annotations:` of an object, or nothing; call with (dict "root" $ "annotations" (dict ...)). */}}
{{- define "xds.annotations" -}}
{{- with mergeOverwrite (dict) .root.Values.commonAnnotations (.annotations | default dict) }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* name, namespace, labels and annotations of an object. */}}
{{- define "xds.metadata" -}}
name: {{ .name | default (include "xds.fullname" .root) }}
namespace: {{ .namespace | default .root.Release.Namespace }}
labels: {{- include "xds.labels" . | nindent 2 }}
{{- include "xds.annotations" . }}
{{- end }}

{{/* What others refer to by name: the Service and the service account. */}}
{{- define "xds.release" -}}
{{- .Values.fullnameOverride | default .Release.Name | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "xds.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "xds.release" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "xds.serviceName" -}}
{{- default (include "xds.release" .) .Values.service.name }}
{{- end }}

{{- define "xds.kubeVersion" -}}
{{- default .Capabilities.KubeVersion.Version .Values.kubeVersion }}
{{- end }}

{{/* Call with (dict "image" ... "tag" <default tag>). */}}
{{- define "xds.image" -}}
{{- if .image.digest }}{{ .image.repository }}@{{ .image.digest }}
{{- else }}{{ .image.repository }}:{{ .image.tag | default .tag }}
{{- end }}
{{- end }}

{{/* A quantity of memory in bytes; nothing where it is not written as 64Mi, 1G or 1048576. */}}
{{- define "xds.bytes" -}}
{{- $factors := dict "" 1 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "k" 1000 "M" 1000000 "G" 1000000000 }}
{{- $text := toString . }}
{{- $unit := regexFind "[A-Za-z]*$" $text }}
{{- $number := trimSuffix $unit $text }}
{{- if and (hasKey $factors $unit) (regexMatch "^[0-9]+$" $number) }}{{ mul (int64 $number) (get $factors $unit) }}{{ end }}
{{- end }}

{{/* Where things are: fixed, because the files on disk name each other by absolute path. */}}
{{- define "xds.dir" -}}/srv/runtime{{- end }}
{{- define "xds.adminDir" -}}/var/run/envoy-admin{{- end }}
{{- define "xds.admin" -}}{{ include "xds.adminDir" . }}/admin.sock{{- end }}
{{- define "xds.tokenDir" -}}/var/run/secrets/kubernetes.io/serviceaccount{{- end }}

{{/* Name of a file that the loader renders, by the format chosen. */}}
{{- define "xds.rendered" -}}
{{- if and .root.Values.services.enabled (eq .root.Values.services.format "json") (eq .file .default) -}}
{{ trimSuffix ".yaml" .file }}.json
{{- else }}{{ .file }}
{{- end }}
{{- end }}

{{/* The loader's `--config`, as YAML. */}}
{{- define "xds.config" -}}
{{- $config := deepCopy .Values.config }}
{{- if and .Values.services.enabled (not (kindIs "invalid" .Values.services.edsBudget)) }}
{{- $config = mergeOverwrite (dict "endpoint" (dict "eds_budget" (int64 .Values.services.edsBudget))) $config }}
{{- end }}
{{- toYaml $config }}
{{- end }}

{{/* Does the own zone come first, so that files differ between nodes? Empty: no. */}}
{{- define "xds.ownZone" -}}
{{- $zone := dig "endpoint" "prefer_zone" "" .Values.config }}
{{- if and .Values.services.enabled (kindIs "bool" $zone) $zone }}yes{{ end }}
{{- end }}

{{/* Does the configuration ask for data of Nodes? Empty: no. */}}
{{- define "xds.needsNodes" -}}
{{- include "xds.ownZone" . }}
{{- if .Values.services.enabled }}
{{- range $_, $from := dig "endpoint" "locality" dict .Values.config }}{{ if hasKey $from "label" }}yes{{ end }}{{ end }}
{{- end }}
{{- end }}

{{/* Are there two pods or more, whose number is in the Deployment or an autoscaler's? Empty: no. */}}
{{- define "xds.several" -}}
{{- if eq .Values.kind "Deployment" }}
{{- if or (kindIs "invalid" .Values.replicaCount) (gt (int .Values.replicaCount) 1) }}yes{{ end }}
{{- end }}
{{- end }}

{{/* What a Service may call the listener's port, as the keys of a mapping: its number, and names. */}}
{{- define "xds.listenerPorts" -}}
{{ .Values.listener.port | int | toString | quote }}: true
{{- range $name, $port := .Values.envoy.ports }}
{{- if eq (int $port.containerPort) (int $.Values.listener.port) }}
{{ $name | quote }}: true
{{- end }}
{{- end }}
{{- end }}

{{/* The first port of the Service that leads to the listener; nothing where there is none. */}}
{{- define "xds.servicePort" -}}
{{- $names := include "xds.listenerPorts" . | fromYaml }}{{ $found := list }}
{{- range $name := keys .Values.service.ports | sortAlpha }}
{{- $port := get $.Values.service.ports $name }}
{{- $target := $port.targetPort | default $port.port }}
{{- if hasKey $names (kindIs "string" $target | ternary $target (toString (int $target))) }}{{ $found = append $found (int $port.port) }}{{ end }}
{{- end }}
{{- with $found }}{{ first . }}{{ end }}
{{- end }}

{{/* Values that make no sense together are an error, before any object is made. */}}
{{- define "xds.check" -}}
{{- $v := .Values }}
{{- range $who, $image := dict "loader" $v.loader.image "envoy" $v.envoy.image }}
{{- if not (regexMatch "^(localhost|[^/]*[.:][^/]*)/." $image.repository) }}
{{- $example := ternary "registry.example/envoy-xds-configmap-loader, built from the Dockerfile" "docker.io/envoyproxy/envoy" (eq $who "loader") }}
{{- fail (printf "%s.image.repository: %q has no registry: give the image as the nodes pull it (%s)" $who $image.repository $example) }}
{{- end }}
{{- if regexMatch "[:@][^/]*$" $image.repository }}
{{- fail (printf "%s.image.repository: %q has a tag or digest: give it in %s.image.tag or %s.image.digest" $who $image.repository $who $who) }}
{{- end }}
{{- end }}
{{- $memory := include "xds.bytes" (dig "limits" "memory" "" ($v.loader.resources | default dict)) }}
{{- $files := include "xds.bytes" $v.runtimeVolume.sizeLimit }}
{{- if and $memory $files (lt (int64 $memory) (add (int64 $files) 67108864)) }}
{{- fail "loader.resources.limits.memory: must be 64Mi above runtimeVolume.sizeLimit or more: the files in memory count as the loader's" }}
{{- end }}
{{- $memory = include "xds.bytes" (dig "limits" "memory" "" ($v.envoy.resources | default dict)) }}
{{- $heap := include "xds.bytes" $v.envoy.overload.maxHeap }}
{{- if and $memory $heap (le (int64 $memory) (int64 $heap)) }}
{{- fail "envoy.overload.maxHeap: must be below envoy.resources.limits.memory, or Envoy is killed before it sheds load" }}
{{- end }}
{{- if dig "admin" "address" "" $v.envoy.bootstrap }}
{{- fail "envoy.bootstrap.admin.address: the admin interface is a Unix socket in a volume of its own: nothing else may reach it" }}
{{- end }}
{{- if $v.listener.enabled }}
{{- $names := include "xds.listenerPorts" . | fromYaml | keys | sortAlpha }}
{{- if lt (len $names) 2 }}
{{- fail (printf "listener.port: %d is in no entry of envoy.ports, so nothing exposes it: set envoy.ports.http.containerPort as well" (int $v.listener.port)) }}
{{- end }}
{{- if and $v.service.enabled (not (include "xds.servicePort" .)) }}
{{- fail (printf "listener.port: no entry of service.ports has it as targetPort (%s)" (join " or " $names)) }}
{{- end }}
{{- end }}
{{- if and $v.services.enabled (not $v.services.selector) }}
{{- fail "services.selector: give the label selector of the Services, or \"*\" for all of them: whoever may create or annotate one that matches adds clusters and routes" }}
{{- end }}
{{- if and $v.upstreams (not $v.listener.enabled) }}
{{- fail "upstreams: needs listener.enabled" }}
{{- end }}
{{- range list "rds.yaml" "cds.yaml" }}
{{- if and $v.upstreams (hasKey $v.xds .) }}
{{- fail (printf "xds: %s would replace the file that upstreams become: give one of the two" .) }}
{{- end }}
{{- end }}
{{- if and $v.drain.enabled (le (int $v.terminationGracePeriodSeconds) (int $v.drain.seconds)) }}
{{- fail "terminationGracePeriodSeconds: must be longer than drain.seconds" }}
{{- end }}
{{- if and $v.services.enabled (has "*" $v.services.namespaces) (gt (len $v.services.namespaces) 1) }}
{{- fail "services.namespaces: \"*\" is all of them: name no other" }}
{{- end }}
{{- if not (or (include "xds.files" . | fromYaml) $v.configMaps $v.configMapSelector $v.services.enabled $v.secrets) }}
{{- fail "nothing for Envoy to read: give xds, upstreams, configMaps, configMapSelector, services or secrets" }}
{{- end }}
{{- end }}
