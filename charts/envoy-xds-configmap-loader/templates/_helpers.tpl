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

{{- define "xds.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "xds.fullname" .) .Values.serviceAccount.name }}
{{- else }}{{ default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "xds.serviceName" -}}
{{- default (include "xds.fullname" .) .Values.service.name }}
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

{{/* Where things are: fixed, because the files on disk name each other by absolute path. */}}
{{- define "xds.dir" -}}/srv/runtime{{- end }}
{{- define "xds.tokenDir" -}}/var/run/secrets/kubernetes.io/serviceaccount{{- end }}

{{/* Name of a file that the loader renders, by the format chosen. */}}
{{- define "xds.rendered" -}}
{{- if and .root.Values.services.enabled (eq .root.Values.services.format "json") (eq .file .default) -}}
{{ trimSuffix ".yaml" .file }}.json
{{- else }}{{ .file }}
{{- end }}
{{- end }}

{{/* Does the configuration ask for data of Nodes? Empty: no. */}}
{{- define "xds.needsNodes" -}}
{{- if .Values.services.enabled }}
{{- $endpoint := .Values.config.endpoint | default dict }}
{{- $zone := get $endpoint "prefer_zone" }}
{{- if and (kindIs "bool" $zone) $zone }}yes{{ end }}
{{- range $_, $from := $endpoint.locality }}{{ if hasKey $from "label" }}yes{{ end }}{{ end }}
{{- end }}
{{- end }}

{{/* What makes no sense is said here, before anything is made. */}}
{{- define "xds.check" -}}
{{- $v := .Values }}
{{- if and $v.upstreams (not $v.listener.enabled) }}
{{- fail "upstreams: needs listener.enabled" }}
{{- end }}
{{- range list "rds.yaml" "cds.yaml" }}
{{- if and $v.upstreams (hasKey $v.xds .) }}
{{- fail (printf "xds: %s would take the place of what upstreams become: give one of the two" .) }}
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
